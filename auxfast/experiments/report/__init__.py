"""What runs show: statistics over seeds, tables, pictures and the page."""
