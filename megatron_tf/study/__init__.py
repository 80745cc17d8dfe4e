"""Studies: many runs that answer one question. A file of arms becomes runs, a queue, results and a report."""
