"""Between the program and the machine: files, signals, child processes, the terminal, trackers, the environment."""
