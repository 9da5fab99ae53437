package ondisk

// Golden is for the tests that need package engine.
var Golden = golden
