"""HTTP on the way in and on the way out: a client's connection and its limits, bodies, ids, paths and errors."""
