"""What the commands do, one file a job; slow to import, so a command imports its job when it runs."""
