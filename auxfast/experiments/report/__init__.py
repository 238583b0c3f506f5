"""Reports of runs: statistics over seeds, tables, pictures and the page."""
