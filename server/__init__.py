"""The coordinator: enrolment of sites, studies, the hub they connect to, and the rounds."""
