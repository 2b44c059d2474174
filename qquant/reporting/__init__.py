"""What is made of a `profile.json` alone: tables, charts, pages and comparisons.

`schema` reads and checks the file; `figures` says what a table is; `accuracy` and `running` make
tables; `charts` makes what is drawn, `svg` and `png` draw it; `page` is the HTML page; `changes` is
the comparison of two profiles. Nothing here measures, and only `png` needs more than the standard
library.
"""
