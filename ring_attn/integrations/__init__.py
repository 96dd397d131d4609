"""Other people's models over a ring. They need transformers, which nothing else imports."""
