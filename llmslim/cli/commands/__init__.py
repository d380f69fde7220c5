"""The commands. A new one is a new file here, named as the command, with a click `command`."""
