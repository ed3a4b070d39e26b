#pragma once

// Catch2 of version 2 or 3, with prefixed macros: c10 has a CHECK of its own.
#define CATCH_CONFIG_PREFIX_ALL
#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>
#endif
