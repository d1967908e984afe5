"""Tables and charts of published studies, from the results of their runs."""
