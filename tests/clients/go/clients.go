// Package clients names the libraries of the Go examples in gateway/docs, so that `go mod` keeps them.
package clients

import _ "github.com/redis/go-redis/v9"
