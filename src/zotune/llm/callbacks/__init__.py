"""Callbacks and trackers around the steps of a run, by the interface of transformers' `Trainer`.

`events` calls the callbacks, `arguments` holds what they read of the run's options, and `trackers` finds the callbacks
of the trackers that `report_to` names.
"""
