"""What a built model costs, how fast it is, and what it keeps: functions behind the tools.

The modules here are imported one by one (``from idlevit_mm.analysis import flops``).
"""
