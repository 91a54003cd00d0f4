"""Files of any form, read as rows, and what a row's fields mean."""
