"""The command line: the only place that prints and exits. One file per command in `commands`."""
