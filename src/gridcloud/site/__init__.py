"""One organisation's daemon: joins the rooms, serves the API and the gateway; decides nothing."""
