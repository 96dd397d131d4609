"""Other people's models over a ring. Each module needs the library that it is named after, and nothing else imports it."""
