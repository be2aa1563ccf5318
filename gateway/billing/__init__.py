"""The books: reports, months that close, statements, and the proof that all of it adds up."""
