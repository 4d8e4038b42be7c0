"""The `burnish` command: one file a verb; parse, call the library, print."""
