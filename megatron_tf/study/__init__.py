"""Studies: many runs that answer one question. From a file of arms to runs, their queue, their results and a report."""
