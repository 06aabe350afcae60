"""Nothing about learning: files, processes, tables, pictures. A first reader skips it."""
