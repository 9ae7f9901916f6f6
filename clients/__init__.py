"""What users import and run: the async and the sync client, the command line, demos."""
