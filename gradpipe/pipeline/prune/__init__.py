"""Stage two as a run: plan, verify, write file by file, publish."""
