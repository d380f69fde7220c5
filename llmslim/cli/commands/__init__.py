"""The commands; a new one is a file here with the name of the command and a click `command`."""
