"""Files here that only a server loads."""

collect_ignore = ["server_extension"]
