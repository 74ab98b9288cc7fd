"""Figures and the self-contained page of a results directory.

    gathered.py          which cases stand for a model, in which order
    chart.py             a figure as data: no series twice, no axis without its unit
    *_charts.py          results -> charts; charts.py has them all
    static_figures.py    charts -> PNG and SVG (matplotlib)
    interactive.py       charts -> the page's figures (plotly)
    answers.py           how much slower, how much memory, what left
    tables.py, cost_tables.py, audit_section.py, diagram.py, page.py, assets/    the page
    write.py             a folder of results -> figures/ and report.html
    tensorboard.py       a folder of results -> event files

Everything that is read here is **unverified** and may be hostile: all of its text is escaped, and the page's content
security policy runs our own scripts alone and forbids every request.
"""
