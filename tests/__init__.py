"""A regular package: packages in the environment install a `tests` of their own, and it must not be found before this one."""
