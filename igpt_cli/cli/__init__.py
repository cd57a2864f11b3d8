"""The command line, one file a command: parse, call one library function, show the result."""
