"""The programmes of the fault table, and which tests belong to which."""

from __future__ import annotations

PROGRAMMES = {
    "R1": "stopped in every step, resumed to the same bytes",
    "R2": "killed (SIGKILL): at random moments, around every file operation",
    "R3": "disk full: at every file, on file systems of every size",
    "R4": "one file damaged: flipped, cut, zeroed, emptied, swapped, removed",
    "R5": "a member of a sweep fails: the others end as if alone",
    "R6": "the same numbers: packed, split, cached, accelerated, together",
    "R7": "merged equals base and adapter, in a fresh process",
    "R8": "adapters of released versions load with equal outputs",
    "R9": "hostile recipes, bases, folders, texts under an audit hook",
    "R10": "SIGINT, SIGTERM, SIGHUP in every stage",
    "R11": "the list of bad inputs and faults, each with its message",
    "R12": "a long sweep with random faults",
}

# Test files, or single tests, by programme. R11 is counted by its items (`tests/faults/items.py`).
TESTS = {
    "R1": (
        "tests/training/test_resume.py::test_resume_is_exact_after_interruptions",
        "tests/training/test_resume.py::test_resume_is_exact_after_every_interruption",
        "tests/training/test_resume.py::test_resume_falls_back_to_the_newest_valid_checkpoint",
        "tests/training/test_resume.py::test_resume_of_a_finished_run_does_nothing",
        "tests/training/test_resume.py::test_resume_without_checkpoint_starts_over",
        "tests/faults/test_items.py::test_processes_that_hash_otherwise_end_with_the_same_bytes",
    ),
    "R2": (
        "tests/faults/test_programme_kills.py",
        "tests/faults/test_kills.py",
        "tests/training/test_resume.py::test_kill_9_at_random_moments",
    ),
    "R3": (
        "tests/faults/test_programme_disks.py",
        "tests/faults/test_storage_faults.py",
        "tests/runtime/test_storage.py::test_full_disk_keeps_the_old_folder",
    ),
    "R4": (
        "tests/faults/test_programme_corruption.py",
        "tests/runtime/test_storage.py::test_every_damaged_byte_is_noticed",
        "tests/runtime/test_storage.py::test_every_cut_of_a_safetensors_file_is_noticed",
    ),
    "R5": (
        "tests/sweep/test_sweep.py::test_unlike_members_that_share_passes_equal_runs_of_their_own",
        "tests/sweep/test_sweep.py::test_members_in_turns_equal_runs_of_their_own_to_the_byte",
        "tests/sweep/test_sweep.py::test_a_member_that_fails_leaves_the_others_alone",
        "tests/sweep/test_sweep.py::test_points_that_cannot_be_used_do_not_stop_the_others",
        "tests/sweep/test_sweep.py::test_a_pass_that_does_not_fit_is_shared_by_fewer",
        "tests/sweep/test_sweep.py::test_rows_that_reach_the_wrong_member_are_noticed",
        "tests/sweep/test_sweep.py::test_a_shared_pass_is_refused_where_it_would_not_be_exact",
        "tests/sweep/test_sweep.py::test_halving_stops_the_worse_and_the_better_are_as_if_alone",
        "tests/run/test_run.py::test_sweep_members_do_not_disturb_each_other",
    ),
    "R6": (
        "tests/training/test_invariants.py",
        "tests/fast/test_fast.py",
        "tests/tasks/test_tasks.py::test_any_split_of_a_step_is_the_same_step",
    ),
    "R7": ("tests/merge/test_merge.py", "tests/merge/test_combine.py"),
    "R8": ("tests/faults/test_released.py",),
    "R9": ("tests/security",),
    "R10": (
        "tests/faults/test_programme_signals.py",
        "tests/training/test_resume.py::test_signals_save_and_exit_with_their_code",
    ),
    "R11": ("tests/faults/test_items.py",),
    "R12": ("tests/faults/test_sweep_faults.py",),
}
# Tests that try more than once, and how often.
TRIES = {
    "tests/training/test_resume.py::test_resume_is_exact_after_interruptions": 5,
    "tests/training/test_resume.py::test_resume_is_exact_after_every_interruption": 24,
}
_ELSE = "R11"  # other tests of tests/faults are of the list of faults


def programme_of(node: str) -> str | None:
    """The programme that a test belongs to, by its node id; None: none."""
    plain = node.partition("[")[0]
    for name, tests in TESTS.items():
        if any(plain == test or plain.startswith((f"{test}::", f"{test}/")) for test in tests):
            return name
    return _ELSE if plain.startswith("tests/faults/") else None
