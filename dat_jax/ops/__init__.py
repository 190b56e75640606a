"""Pure functions on arrays: no parameters, no configuration.

* ``attention``, ``detection``, ``layers``: the ops, by subject.
* ``dispatch``: the choice between the algorithms of an op, by platform and map size.
* ``cpu``, ``pallas``: algorithms for one platform only, selected by ``dispatch``.
"""
