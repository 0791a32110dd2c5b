"""A gallery in PostgreSQL: the catalogue in tables, the vectors of each space in a table of pgvector's type."""
