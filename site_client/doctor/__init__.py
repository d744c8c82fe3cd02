"""The doctor: small questions about a site, each with what was found and what to do; it changes nothing."""
