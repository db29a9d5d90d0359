"""Reads the groups and recipes of `--config-dir`: each file is checked before Hydra composes it.

Hydra imports every module in this namespace for every application, so this one imports nothing else and does nothing until it
is asked for a file. (No annotations as strings: Hydra's scan cannot read them beside dataclasses.)
"""

import io
import os
from pathlib import Path

from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf

_MAX_BYTES = 2**17  # seconds to read, whatever stands in it


class UserFiles(ConfigSource):
    """A folder of YAML files that somebody else may have written."""

    @staticmethod
    def scheme():
        return "lora_lab"

    def load_config(self, config_path):
        """Read, check and parse one file.

        Raises:
            ConfigError: what is wrong with it, with line and column.
        """
        from lora_lab.config.allowed import check_file
        from lora_lab.errors import ConfigError
        from lora_lab.runtime.reading import parse_yaml, read_text, reading

        file = self._file(config_path)
        text = read_text(file, ConfigError, _MAX_BYTES)
        tree = parse_yaml(file, text, ConfigError)
        with reading(file, ConfigError, "Fix the file."):
            header = ConfigSource._get_header_dict(text[:512])
            check_file(file, tree, header["package"])
            config = OmegaConf.load(io.StringIO(text))
        return ConfigResult(config=config, path=self.full_path(), provider=self.provider, header=header)

    def is_config(self, config_path):
        """Whether there is such a file.

        Raises:
            ConfigError: it would stand in the place of a file of Hydra's.
        """
        from lora_lab.errors import ConfigError

        file = self._file(config_path)
        there = os.path.lexists(file) and not os.path.isdir(file)
        if there and Path(config_path).parts[:1] == ("hydra",):
            raise ConfigError(f"{file}: would replace Hydra's own. Remove it; hydra/launcher=NAME chooses a launcher.")
        return there

    def is_group(self, config_path):
        return os.path.isdir(os.path.join(self.path, config_path))

    def available(self):
        return self.is_group("")

    def list(self, config_path, results_filter):
        found = []
        for name in os.listdir(os.path.join(self.path, config_path)):
            self._list_add_result(found, os.path.join(config_path, name), name, results_filter)
        return sorted(set(found))

    def _file(self, config_path):
        return Path(self.path, self._normalize_file_name(config_path))
