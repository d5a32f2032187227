"""One page that shows a run, or a data set: sections of tables, plots and pictures in a single HTML file.

page.py renders sections; plots.py draws; workdir.py reads the files of a run; each other file makes one section.
"""
