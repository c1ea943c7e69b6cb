"""What several test files share. Nothing here is named test_."""
