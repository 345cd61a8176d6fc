"""What a silo's text is, as counts that may leave the site, and several sites' side by side."""
