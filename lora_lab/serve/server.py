"""`lora-lab serve`: from a command line to a server that listens, and to its end."""

from __future__ import annotations

import functools
import importlib.util
import signal
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab.config import compose
from lora_lab.config.compose import chosen, parse_override
from lora_lab.config.run import all_keys, with_defaults
from lora_lab.data import personal
from lora_lab.errors import ConfigError
from lora_lab.runtime import console
from lora_lab.serve import presidio
from lora_lab.serve.config import ServeConfig
from lora_lab.serve.keys import Keys

if TYPE_CHECKING:
    from lora_lab.config.run import RunConfig
    from lora_lab.serve.app import Service
    from lora_lab.serve.guard import Guard

_NEEDED = ("starlette", "uvicorn", "prometheus_client", *personal.PACKAGES)


def check_extra(verb: str = "serve", needed: Sequence[str] = ()) -> None:
    """
    Args:
        needed: modules that the verb imports; none: those of a server.

    Raises:
        ConfigError: a library of the extra is missing.
    """
    needed = needed or _NEEDED
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"lora-lab {verb} needs {', '.join(missing)}. pip install 'lora-lab[serve]'")


def settings(config: RunConfig, overrides: Sequence[str]) -> ServeConfig:
    """The `serve` section as the command line says it: a run's folder, which may have been received, opens no ports.

    Args:
        config: a run's, with the overrides.
    """
    told: set[str] = set()
    for override in map(parse_override, overrides):
        key = override.key_or_group
        told |= {f"serve.{name}" for name in chosen(override)} if key == "serve" else {key}
    untold = [key for key in all_keys() if key.startswith("serve.") and key not in told]
    return with_defaults(config, untold).serve


def check(config: ServeConfig) -> Keys | None:
    """The keys of a server, once it is certain that it may listen.

    Raises:
        ConfigError: it would be open to the network without keys, or a file that it needs is not there.
    """
    keys = None if config.keys is None else Keys.read(Path(config.keys).expanduser())
    if keys is None and not config.on_loopback:
        raise ConfigError(
            f"serve.host={config.host}: others could reach it, and nobody would need a key. Make one (lora-lab serve add_key=NAME "
            "serve.keys=keys.json) and name the file: serve.keys=keys.json"
        )
    for name in ("certificate", "certificate_key"):
        file = getattr(config, name)
        if file is not None and not Path(file).expanduser().is_file():
            raise ConfigError(f"serve.{name}={file}: no such file.")
    if config.presidio_model is not None and not config.presidio:
        raise ConfigError("serve.presidio_model: no effect without serve.presidio. Drop it.")
    check_certificate(config)
    check_engine(config)
    check_replicas(config)
    if config.training:
        check_training(config)
    if config.root is not None and not Path(config.root).expanduser().is_dir():
        raise ConfigError(f"serve.root={config.root}: no such folder.")
    return keys


def check_certificate(config: ServeConfig) -> None:
    """
    Raises:
        ConfigError: the files are not a certificate and its key.
    """
    files = tls(config)
    try:
        if files:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(files["ssl_certfile"], files["ssl_keyfile"])
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"serve.certificate={config.certificate}: is not the PEM file of a certificate, or serve.certificate_key="
            f"{config.certificate_key} not the one of its private key."
        ) from error


def tls(config: ServeConfig) -> dict[str, str]:
    """uvicorn's options for certificates; none: it speaks plain HTTP."""
    if config.certificate is None or config.certificate_key is None:
        return {}
    files = {"ssl_certfile": config.certificate, "ssl_keyfile": config.certificate_key}
    return {name: str(Path(file).expanduser()) for name, file in files.items()}


def check_training(config: ServeConfig) -> None:
    """
    Raises:
        ConfigError: what training over the base needs is not there.
    """
    if config.root is None:
        raise ConfigError("serve.training=true: needs serve.root, the folder that checkpoints are written below.")
    if importlib.util.find_spec("google") is None or importlib.util.find_spec("google.protobuf") is None:
        raise ConfigError("serve.training=true needs protobuf. pip install 'lora-lab[serve]'")


def check_engine(config: ServeConfig) -> None:
    """
    Raises:
        ConfigError: what is said of another program has no effect, or what is said beside it.
    """
    if config.engine is None:
        without: dict[str, object] = {"engine_command": config.engine_command, "engine_base": config.engine_base}
        lost, beside = [name for name, value in without.items() if value], "without serve.engine"
    else:
        without = {"training": config.training, "root": config.root, "cache_gib": config.cache_gib}
        if config.engine != "llama":
            without["engine_base"] = config.engine_base
        lost, beside = [name for name, value in without.items() if value], f"beside serve.engine={config.engine}"
    if lost:
        raise ConfigError(*(f"serve.{name}: no effect {beside}. Drop it." for name in lost))


_ALONE = {  # keys that would hold in one of several processes alone, and why
    "engine": "that program has processes and threads of its own",
    "training": "what clients train is in the memory of one",
    "root": "an adapter that comes would come to one; name all of them at the start",
    "requests_per_minute": "each would count by itself; a balancer before them can limit",
    "tokens_per_minute": "each would count by itself",
    "concurrent_requests": "each would count by itself; a balancer before them can limit",
}


def check_replicas(config: ServeConfig) -> None:
    """
    Raises:
        ConfigError: something that only one process can do is asked of several.
    """
    if config.replicas == 1:
        return
    lost = [(name, why) for name, why in _ALONE.items() if getattr(config, name)]
    if lost:
        raise ConfigError(
            *(
                f"serve.{name}: not beside serve.replicas={config.replicas}: {why}. Drop one of the two."
                for name, why in lost
            )
        )


def base_config(base: str, overrides: Sequence[str]) -> RunConfig:
    """What a base alone is served with."""
    return compose.compose(["model=hub", f"model.path={base}", "quant=none", "data.train=none", *overrides])


def prepared(
    paths: Sequence[str], config: RunConfig, overrides: Sequence[str], serve: ServeConfig, folder: Path | None = None
) -> Service:
    """Everything loaded, and the thread that answers at work.

    Args:
        paths: of runs; none: the base alone.
        config: the first run's, or the base's.
        overrides: of the command line.
        folder: of `Metrics`.
    """
    from lora_lab.serve.app import Service
    from lora_lab.serve.engine import Engine
    from lora_lab.serve.metrics import Metrics
    from lora_lab.serve.shelf import Shelf, open_base, open_run

    metrics = Metrics(folder)
    finders = presidio.finders(serve.presidio, serve.presidio_model) if serve.presidio else {}
    opened = [open_run(path, overrides, name) for path, name in zip(paths, names(paths), strict=True)]
    base = open_base(opened[0].config if opened else config)
    if serve.engine is not None:
        from lora_lab.serve.external.engine import started

        return Service(*started(opened, base, serve, metrics), serve, metrics, overrides, finders)
    shelf = Shelf(base)
    for one in opened:
        shelf.check(one)
    shelf.start()
    for one in opened:
        served = shelf.ready(one)()
        console.say("adapter", f"{served.name}: {served.exactness}; probes: {served.probes}")
    engine = Engine(shelf, serve.max_rows, serve.max_waiting, metrics, serve.cache_gib, serve.replicas)
    service = Service(shelf, engine, serve, metrics, overrides, finders)
    if serve.training:
        from lora_lab.serve.tinker.routes import Training

        service.training = Training(shelf, engine, serve, metrics)
        console.say("training", "clients train over this base: docs/training_server.md")
    engine.start()
    return service


def names(paths: Sequence[str]) -> list[str]:
    """What clients call the runs in these folders: by their last part, and the one before where that is not enough.

    Raises:
        ConfigError: two would be called the same.
    """
    folders = [Path(path).expanduser().resolve() for path in paths]
    last = [folder.name for folder in folders]
    found = [
        folder.name if last.count(folder.name) == 1 and folder.name != "base" else f"{folder.parent.name}-{folder.name}"
        for folder in folders
    ]
    twice = next((name for name in found if found.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"runs: two of them would be called {twice}. Rename a folder.")
    return found


def serve(paths: Sequence[str], config: RunConfig, overrides: Sequence[str], quiet: Callable[[], None]) -> None:
    """Serve until a signal comes.

    Args:
        quiet: keeps libraries quiet, in each process that loads them.

    Raises:
        LoraLabError: whatever stands against it, before it listens.
    """
    from lora_lab.serve.listening import listen

    told = settings(config, overrides)
    keys = check(told)
    options: dict[str, Any] = {**tls(told)}
    made = functools.partial(_application, paths, config, overrides, told, keys, quiet)
    if told.replicas > 1:
        from lora_lab.serve import replicas

        replicas.keep(made, told, options)  # until a signal ends it
    app, service = made()

    def listens(port: int) -> None:
        console.say("serving", f"{'https' if options else 'http'}://{told.host}:{port}")

    def stopping(number: signal.Signals, again: bool) -> None:
        seconds = 0 if again else told.stop_seconds
        console.say("stopping", f"by {number.name}: open answers may go on for {seconds:g} s")
        service.engine.stop(seconds)

    try:
        listen(
            app,
            told.host,
            told.port,
            listens,
            stopping,
            key="serve.port",
            stop_seconds=int(told.stop_seconds) + 5,
            **options,
        )
    finally:
        service.engine.stop(0)
        service.engine.join(10)
        if service.training is not None:
            service.training.close()


def _application(
    paths: Sequence[str],
    config: RunConfig,
    overrides: Sequence[str],
    told: ServeConfig,
    keys: Keys | None,
    quiet: Callable[[], None],
    folder: Path | None = None,
) -> tuple[Guard, Service]:
    """Everything loaded, behind its checks; see `prepared`."""
    quiet()  # before the libraries are there
    from lora_lab.serve import logs
    from lora_lab.serve.app import build

    service = prepared(paths, config, overrides, told, folder)
    logs.attach(service.metrics)
    return build(service, keys), service
