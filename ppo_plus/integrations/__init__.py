"""Files and scripts of other libraries."""
