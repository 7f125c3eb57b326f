"""Run folders: settings, results, figures and export of a batch run; no Ray."""
