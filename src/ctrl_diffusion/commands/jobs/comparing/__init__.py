"""Compare methods: what each is, and the table of their rows."""
