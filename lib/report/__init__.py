"""The report of a study, from what is on disk alone, also while the study is half finished.

`content` makes one JSON dict of it (report.json); `markdown`, `spreadsheet`, `charts` and `page` each show that dict and
nothing else; `files` writes them all.
"""
