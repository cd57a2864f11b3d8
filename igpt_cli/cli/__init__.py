"""The command line: one file a command. Each parses, calls one public function of the library, and shows the result."""
