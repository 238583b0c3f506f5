"""Eight tasks that nobody tunes for: is learning the combination safe with the defaults?"""
