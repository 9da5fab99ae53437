package estimate

import (
	"testing"

	"go.uber.org/goleak"
)

// TestMain finds what goes on when all tests have ended.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }
