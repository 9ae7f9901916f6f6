"""Who is out there: records, key names, the store interface, one module a store."""
