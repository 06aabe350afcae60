"""Files, processes, tables, pictures, optimizers, graphs: a first reader skips it."""
