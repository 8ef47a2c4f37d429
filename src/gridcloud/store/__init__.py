"""What a site remembers: SQLite through SQLAlchemy, with migrations."""
