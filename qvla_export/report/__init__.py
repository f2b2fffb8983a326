"""Run folder -> one self-contained HTML page; see `qvla_export.report.page`."""
