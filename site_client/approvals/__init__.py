"""Who this site is and what it has agreed to: its keys, its enrolment, its signed approvals."""
