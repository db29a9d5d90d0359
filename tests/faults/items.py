"""The list of bad inputs and faults that lora_lab survives, and the tests that assert each with its message.

A test is named by its node id, with the parameters in brackets where only they belong to the item.
"""

from __future__ import annotations

from typing import NamedTuple


class Item(NamedTuple):
    """One bad input or fault."""

    title: str
    tests: tuple[str, ...]


_ROWS = "tests/data/test_data_faults.py::test_bad_rows_stop_before_the_model"
_DATA = "tests/data/test_data_faults.py::"
_KEYS = "tests/config/test_config.py::test_refuses"
_OWN = "tests/faults/test_items.py::"


def _rows(*names: str) -> tuple[str, ...]:
    return tuple(f"{_ROWS}[{name}]" for name in names)


def _keys(*overrides: str) -> tuple[str, ...]:
    return tuple(f"{_KEYS}[{override}]" for override in overrides)


ITEMS = {
    # configuration
    1: Item("a key with a typo", _keys("adapter.rnak=8", "learning_rate=1e-4")),
    2: Item("an unknown recipe or group", ("tests/config/test_config.py::test_unknown_choice_lists_the_choices",)),
    3: Item("a rank of the wrong type or size", _keys("adapter.r=0", "adapter.r=-4", "adapter.r=1.5", "adapter.r=true")),
    4: Item("a rank above a layer's smaller side", ("tests/verbs/test_cli.py::test_a_rank_above_a_layer_is_said_with_numbers",)),
    5: Item("a learning rate that is none", _keys("optim.lr=0", "optim.lr=nan", "optim.lr=1e-4x")),
    6: Item("alpha 0, dropout 1", _keys("adapter.lora_alpha=0", "adapter.lora_dropout=1.0")),
    7: Item("an empty sweep, a point twice", (f"{_OWN}test_a_point_twice_is_said", f"{_OWN}test_a_sweep_of_nothing")),
    8: Item(
        "two keys that contradict each other",
        (*_keys("train.micro_batch_size=16"), "tests/config/test_config.py::test_contradictory_quantization",
         "tests/training/test_invariants.py::test_unpackable_architecture_is_refused_or_runs_unpacked"),
    ),
    9: Item("an interpolation of nothing", _keys("name=${nope}")),
    10: Item(
        "a recipe that names code", (*_keys("train._target_=os.system"), "tests/config/test_config.py::test_a_recipe_cannot_run_code")
    ),
    11: Item("a configuration of a newer version", ("tests/config/test_config.py::test_newer_configuration_is_refused",)),
    # rows
    12: Item("no rows, none left", _rows("empty.jsonl", "blank.jsonl", "header.csv", "filtered.jsonl")),
    13: Item("columns that are missing", _rows("columns.jsonl", "gap.jsonl", "mapped.jsonl")),
    14: Item("a text that is no text", _rows("null.jsonl", "nan.jsonl", "float.jsonl")),
    15: Item(
        "another encoding, marks, line ends, NUL",
        (*_rows("latin.jsonl", "latin.csv", "nul.jsonl"), f"{_DATA}test_marks_and_line_ends_do_not_matter"),
    ),
    16: Item("a line that is no JSON", _rows("broken.jsonl", "list.jsonl", "deep.jsonl")),
    17: Item(
        "rows of which nothing is trained",
        (*_rows("masked.jsonl", "all_masked.jsonl"), f"{_DATA}test_masked_rows_can_be_dropped_and_are_counted"),
    ),
    18: Item("a prompt that leaves no room for the answer", _rows("answer_long.jsonl")),
    19: Item("a row that is too long", (*_rows("long.jsonl"), "tests/data/test_data.py::test_too_long_drop_counts")),
    20: Item(
        "labels out of range",
        (*_rows("classes.jsonl", "negative.jsonl", "one_class.jsonl"), f"{_DATA}test_tokenizer_beyond_the_embedding_is_refused"),
    ),
    21: Item(
        "no chat template, a hostile one",
        ("tests/data/test_data.py::test_plain_template_supervises_the_end", f"{_DATA}test_bad_templates_are_refused"),
    ),
    22: Item("roles out of order, an empty turn", _rows("order.jsonl", "role.jsonl", "first.jsonl", "silent.jsonl")),
    23: Item("training rows that are held out too", (f"{_DATA}test_rows_of_both_sides_are_counted",)),
    24: Item("a data file that changed before a resume", ("tests/training/test_resume.py::test_resume_refuses_changed_data_and_overrides",)),
    25: Item("a line without end, a compressed bomb", _rows("endless.jsonl", "bomb.jsonl.gz")),
    # tokenizer and base
    26: Item("no pad token, pad equal to end", (f"{_DATA}test_end_of_sequence_is_learned_without_a_pad_token",)),
    27: Item("a tokenizer larger than the embedding", (f"{_DATA}test_tokenizer_beyond_the_embedding_is_refused",)),
    28: Item(
        "tied embeddings",
        ("tests/verbs/test_cli.py::test_tied_head_is_refused", "tests/merge/test_merge.py::test_float32_merge_equals_base_and_adapter"),
    ),
    29: Item(
        "target modules that match nothing",
        ("tests/verbs/test_cli.py::test_target_modules_that_match_nothing",
         "tests/training/test_invariants.py::test_fresh_adapter_changes_nothing_and_covers_all_layers"),
    ),
    30: Item("numbers that overflow", ("tests/training/test_invariants.py::test_the_first_module_that_is_not_finite_is_named",)),
    31: Item("rows beyond the model's positions", (f"{_DATA}test_rows_beyond_the_positions_are_refused",)),
    32: Item("a config.json that names code", (f"{_DATA}test_configs_that_name_code_are_refused",)),
    33: Item("a base of pickles", (f"{_DATA}test_only_pickled_weights",)),
    # adapters
    34: Item(
        "another base of the same shape",
        ("tests/verbs/test_cli.py::test_adapter_on_another_base_is_refused", "tests/run/test_run.py::test_fingerprint_knows_weights_not_names"),
    ),
    35: Item("another quantization than in training", (f"{_OWN}test_another_quantization_is_said",)),
    36: Item("missing, extra, renamed tensors", (f"{_OWN}test_tensors_of_other_names_are_refused",)),
    37: Item(
        "a rank that the tensors do not have",
        ("tests/training/test_resume.py::test_tensors_that_do_not_fit_are_refused",
         "tests/merge/test_combine.py::test_an_adapter_that_contradicts_itself_is_refused"),
    ),
    38: Item("an unknown field in adapter_config.json", (f"{_OWN}test_an_edited_adapter_config_is_refused[newer]",)),
    39: Item("adapter_config.json names a library to import", (f"{_OWN}test_an_edited_adapter_config_is_refused[auto_mapping]",)),
    40: Item("a name that is a path", (f"{_OWN}test_a_name_that_is_a_path_writes_nothing_outside",)),
    41: Item("NaN in an adapter", ("tests/training/test_resume.py::test_tensors_that_do_not_fit_are_refused",)),
    42: Item("merged twice", (f"{_OWN}test_merging_twice_gives_the_same_bytes",)),
    43: Item("adapters of unlike ranks", ("tests/merge/test_combine.py::test_the_default_is_the_true_weighted_sum",)),
    # files
    44: Item("a safetensors file cut anywhere", ("tests/runtime/test_storage.py::test_every_cut_of_a_safetensors_file_is_noticed",)),
    45: Item("hostile safetensors headers", (f"{_OWN}test_hostile_headers_are_refused",)),
    46: Item("a file of zeros of the right size", ("tests/runtime/test_storage.py::test_every_damaged_byte_is_noticed",)),
    47: Item(
        "one bit flipped",
        ("tests/runtime/test_storage.py::test_every_damaged_byte_is_noticed",
         "tests/training/test_resume.py::test_resume_falls_back_to_the_newest_valid_checkpoint"),
    ),
    48: Item("an index that leaves the folder", ("tests/verbs/test_cli.py::test_damaged_base_is_refused",)),
    49: Item("a missing shard", (f"{_OWN}test_a_missing_shard_is_named",)),
    50: Item("a pickle named .safetensors", (f"{_OWN}test_a_pickle_of_another_name_is_refused",)),
    51: Item("saving onto the file that is mapped", (f"{_OWN}test_saving_onto_what_is_being_read",)),
    52: Item(
        "an output folder that cannot be",
        ("tests/verbs/test_cli.py::test_existing_run_folder_is_untouched", "tests/verbs/test_cli.py::test_folders_that_cannot_be_written",
         "tests/config/test_config.py::test_paths_of_any_language", f"{_OWN}test_a_folder_name_of_256_letters"),
    ),
    # resources
    53: Item("a full disk", ("tests/runtime/test_storage.py::test_full_disk_keeps_the_old_folder", "tests/faults/test_programme_disks.py")),
    54: Item("not enough memory", ("tests/training/test_oom.py::test_a_step_that_does_not_fit_is_made_smaller",)),
    55: Item(
        "signals, once and twice",
        ("tests/training/test_resume.py::test_signals_save_and_exit_with_their_code",
         "tests/training/test_train.py::test_first_signal_is_held_back_the_second_is_not"),
    ),
    56: Item("SIGKILL at any moment", ("tests/faults/test_programme_kills.py",)),
    57: Item("a torn last line", ("tests/training/test_train.py::test_metrics_log_rewinds_and_survives_a_torn_line",)),
    58: Item("a loss that is not finite", ("tests/training/test_invariants.py::test_non_finite_loss_stops_before_the_update",)),
    59: Item("a loss that rises again", ("tests/training/test_invariants.py::test_early_stopping_and_best_adapter",)),
    60: Item("two processes in one run folder", ("tests/runtime/test_storage.py::test_lock_is_for_one",)),
    61: Item("a clock that jumps back", (f"{_OWN}test_order_is_by_step_not_by_time_or_name",)),
    62: Item(
        "a hub that cannot be reached",
        ("tests/data/test_dataset.py::test_hub_data_that_cannot_be_reached", "tests/run/test_run.py::test_names_of_models_and_data"),
    ),
    63: Item("no GPU", (f"{_OWN}test_no_gpu_is_said",)),
    64: Item("another library version at a resume", (f"{_OWN}test_another_library_version_is_said",)),
    # resuming and sweeps
    65: Item("a resume with other settings", (f"{_OWN}test_edited_settings_are_named_and_refused",)),
    66: Item("a resume of a finished run", ("tests/training/test_resume.py::test_resume_of_a_finished_run_does_nothing",)),
    67: Item("a resume in the middle of an epoch or a step", ("tests/training/test_resume.py::test_resume_is_exact_after_interruptions",)),
    68: Item(
        "a member of a sweep that fails",
        ("tests/sweep/test_sweep.py::test_a_member_that_fails_leaves_the_others_alone",
         "tests/sweep/test_sweep.py::test_a_sweep_with_points_that_cannot_be_used_begins_none"),
    ),
    69: Item("a sweep that is killed", ("tests/sweep/test_sweep.py::test_a_killed_sweep_goes_on_where_it_stopped",)),
    70: Item("a metric that is not finite", (f"{_OWN}test_what_is_not_finite_never_wins",)),
    71: Item("a metric that is not measured", (f"{_OWN}test_a_metric_with_a_typo_is_refused_at_once",)),
}  # fmt: skip
