"""Where prepared data lie: this machine, a web server, an S3 store, with a local cache."""
