"""Tables and figures of published studies, from the results of their runs."""
